"""Small things that every room uses: the device, progress lines, random bits. Imports no other room."""
