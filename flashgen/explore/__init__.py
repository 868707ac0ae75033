"""Looking at kernels from outside: timing them beside their peers."""
