"""A recipe as the user wrote it: fields (each one a flag), rules, parsing. (no torch)"""
