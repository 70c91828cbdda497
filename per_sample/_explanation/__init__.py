"""What ``explain`` returns: the record of a call, advice on it, and how both are shown."""
