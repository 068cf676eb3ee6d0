"""Types, errors, files, chance, signals: what every room stands on. (no torch)"""
