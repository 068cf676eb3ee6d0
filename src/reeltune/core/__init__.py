"""What every folder uses: types, errors, files, random seeds, signals. (no torch)"""
