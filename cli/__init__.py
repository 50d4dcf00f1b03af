"""The `moelora` command, installed as the package `moelora_cli`.

One command per file: its options, one call into the library, one thing displayed. Nothing heavy is
imported outside a function, so `--help` answers at once.
"""
