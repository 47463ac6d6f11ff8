"""CLIPSeg: a mask from words. `model` runs the network, `maps` makes mask and heat map of what it says."""
