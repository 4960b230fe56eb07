"""Adapters of other libraries, read and written: pyreft, AdapterHub's adapters, EasySteer."""
