"""The compose file in real containers: python -m loadtest.compose."""
