"""What learned rounding is made of: blocks of the network, how far they are fitted, and their quantizers."""
