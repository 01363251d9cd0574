"""Makes a model that was trained with full attention remember less, and measures what it costs."""
