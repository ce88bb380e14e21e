"""A weight -> bytes -> a product: number formats for linear layers, one scheme per file."""
