"""What follows from the formats together: codes, scales and biases that are fitted to the float network, layer by layer
and block by block."""
