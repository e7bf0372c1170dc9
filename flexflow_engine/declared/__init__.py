"""What plugins declare and give back, checked where the engine takes it, so that a mistake is told as its plugin's."""
