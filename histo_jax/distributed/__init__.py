"""Devices and processes: mesh, joining, consensus, memory, runtime."""
