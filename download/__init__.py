"""What only mini_vqa_v2.py needs: the official text files, the COCO images, HTTP."""
