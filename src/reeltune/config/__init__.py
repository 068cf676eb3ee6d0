"""A run as the user wrote it: fields, rules, parsing. (no torch)"""
