"""What a forward used and what it cost, for reading, printing and plotting."""
