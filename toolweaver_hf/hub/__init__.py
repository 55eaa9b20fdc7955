"""Upload of output folders to the Hub, with the code and the card that they need."""
