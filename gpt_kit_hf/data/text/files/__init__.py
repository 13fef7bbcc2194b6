"""What a file is, and other forms of files as text.

`file_types` tells by its content what a file is, and what would work for one that is no text. `plain_files` refuses
those, and converts archives (`archives`), tables such as CSV (`tables`), other encodings and pipes into copies that
`file_cache` keeps. `remote_files` copies what URLs name. `spans` reads parts of files.
"""
