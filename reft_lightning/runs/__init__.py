"""One run: build, train, evaluate, and record the results."""
