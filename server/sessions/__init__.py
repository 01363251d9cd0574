"""Sessions: the streams of each request, their owners and their subscribers."""
