"""What people look at: pictures, HTML, Markdown."""
