"""Who may call, what they may use, and how they connect."""
