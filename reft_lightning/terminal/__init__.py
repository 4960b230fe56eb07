"""What a terminal shows while work goes on, and a pipe instead."""
