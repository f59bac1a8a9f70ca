"""What is shown of finished and running runs. Reads run folders, and knows no training."""
