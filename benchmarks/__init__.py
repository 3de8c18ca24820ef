"""Speed and memory of the methods, always as ratios measured in one run."""
