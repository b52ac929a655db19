"""Who may send how much: one algorithm, two stores behind one contract. Nothing here does I/O."""
