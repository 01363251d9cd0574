"""What a server has to survive, one scenario a module; servers are started by their command line."""
