"""Several devices and processes: mesh, joining, consensus, restarts, memory, runtime."""
