"""Small modules that every room may use: device, signals, disk, progress lines, hashing. Imports no other room."""
