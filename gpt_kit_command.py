"""The `gpt-kit` command."""


def main() -> None:
    """Run the command line."""
