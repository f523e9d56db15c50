"""Many requests at once: routed first, grouped by expert, answered once each, none lost."""
