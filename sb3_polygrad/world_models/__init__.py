"""World models: fit on real windows, imagine under a policy."""
