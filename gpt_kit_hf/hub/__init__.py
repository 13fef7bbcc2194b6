"""Model folders and the Hub: finding, checking, publishing and downloading models.

`model_folder` opens a run, a folder or a Hub repository; `safety`, `untrusted_files` and `template_sandbox` check one
before it is loaded; `push`, `manifest` and `secret_scan` publish one; `verify` and `probe` compare what was published.
"""
