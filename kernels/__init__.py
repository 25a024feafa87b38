"""The losses' formulas and what compiles them; knows Numba and LLVM, knows no array library."""
