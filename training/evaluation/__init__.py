"""What a model reaches on the committed test prompts: is what it paints right, does its CLIP choose well?"""
