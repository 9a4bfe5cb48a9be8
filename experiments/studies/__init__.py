"""What the studies of losses share: options, training of many runs at once, tables."""
