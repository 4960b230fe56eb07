"""The configuration: schema, composition, error messages, and the identity of a run."""
