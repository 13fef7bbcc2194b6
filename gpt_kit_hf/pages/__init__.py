"""Web pages of this machine, for a look at models and runs.

`server` is what every page is served by: loopback only, files of this package only.
"""
