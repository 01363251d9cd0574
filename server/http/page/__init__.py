"""The page that the gateway serves, and what it calls: a stream's own events, and its session."""
