"""Text generation: `generate` for Python, the fast decoder, the terminal chat and the HTTP server."""
