"""How an array is described to the drivers: a row of 64-bit integers."""

# Columns of an array's record; its strides in bytes follow. CLASS_STEP is the stride between classes, or 1 for
# unsigned class indices.
ADDRESS, ITEMSIZE, DIRECT, SWAP, CLASS_STEP, STRIDES = range(6)

# a row loss's records, in order; the first four have a class dimension
LOGITS, PROBABILITIES, GRAD, GRAD_TARGET, INDEX, UPSTREAM, LOSSES = range(7)
N_CLASSY = 4
