"""One module for each kind of engine; each has the functions of `adapter.Adapter`."""
