"""What a server has to survive, one scenario a module. They start servers by the command line."""
