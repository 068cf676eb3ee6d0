"""Memory levers: recomputed, swapped and offloaded blocks, the host's room."""
