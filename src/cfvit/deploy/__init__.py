"""From a model to a service: what is needed to run it elsewhere."""
