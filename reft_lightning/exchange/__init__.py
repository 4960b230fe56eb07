"""Adapters of other libraries, read and written: pyreft, AdapterHub, EasySteer, llama.cpp; interventions as weights."""
