"""What every other folder uses: settings and flags, files, image decoding, labels, device, distributed."""
