"""Adapters of other libraries, read and written: pyreft, AdapterHub's, EasySteer; interventions as weights."""
