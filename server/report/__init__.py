"""A run's report: what is read, what is drawn, what is warned of, and the page that holds it all."""
