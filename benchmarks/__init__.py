"""Programs that measure: how fast training is, and whether it survives being killed."""
