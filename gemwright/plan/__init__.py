"""What fits, how fast it will be and what it costs, before anything is loaded; never imports torch."""
