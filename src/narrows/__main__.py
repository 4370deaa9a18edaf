from narrows.cli import main

main()
